"""Problems, and which answers are right."""
