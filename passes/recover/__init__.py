"""A quantized model back to the float model that it stands for, and the ranges that it was given or trained with."""
