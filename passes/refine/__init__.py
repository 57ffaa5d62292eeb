"""What makes the quantized model answer more like the float one."""
