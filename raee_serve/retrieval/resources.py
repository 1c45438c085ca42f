"""What look-ups may use of the machine. Imports nothing, so that settings can be checked early."""

DEFAULT_BACKEND = "onnx-int8"
BATCH_SIZE = {"torch": 8, "onnx": 4, "onnx-int8": 1}
"""Back ends of the encoder, and how many texts of similar length each takes at once: on a CPU
larger batches gain less than their padding costs. One at a time, 8-bit activations are scaled for
each text alone, so that its vector does not depend on its company."""

ROWS_IN_MEMORY_MB = 256.0
"""Vectors up to this size are held in memory. 384 dimensions: 170,000 rows, which a lone prompt is
compared with about as fast as an index answers."""
