"""How jax runs here: settings, compiled programs, the compile cache, devices, interrupts."""
