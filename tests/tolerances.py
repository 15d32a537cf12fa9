"""What tests accept, and the noise measured that says why.

Errors are relative: |out - oracle| / |oracle| in the Euclidean norm over the whole output.
"""

# Measured in the interpreter: 3e-4 to 9e-4 for float16, 2e-3 to 4e-3 for bfloat16, most of it the rounding of the
# output and of softmax weights (bfloat16 alone rounds to 1.7e-3 rms).
ATTENTION = {"float16": 2e-3, "bfloat16": 8e-3}
# With logits up to 35 every rounding of a key counts 35 times: measured on an H100 2.7e-3 for the portable kernels in
# float16, which round a key three times to 2^-11. Rounding decoded keys to bfloat16, and nothing else, costs 6.6e-3.
ATTENTION_PEAKED = 4e-3
# Products in half precision choose another of two nearly equal centroids: squared error of the codes over the
# oracle's. Measured: below 1.0005 for float16 and 1.004 for bfloat16.
ENCODE_DISTORTION = {"float16": 1.005, "bfloat16": 1.02}
