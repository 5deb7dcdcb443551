"""Registry, configuration and errors: what every room shares. No torch model code."""
