"""Float rewrites that make quantization easier."""
