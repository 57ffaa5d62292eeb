"""Which placed nodes stay, and in which form: saturation."""
