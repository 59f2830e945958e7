"""HF safetensors to parameter trees and back: one rule table a family, applied strictly (`rules.py`)."""
