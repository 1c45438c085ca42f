"""What look-ups may use of the machine. Imports nothing, so that settings can be checked early."""

DEFAULT_BACKEND = "onnx-int8"
BATCH_SIZE = {"torch": 8, "onnx": 32, "onnx-int8": 32}
"""Back ends of the encoder, and how many texts of similar length each is given at once. On a CPU
torch gains less from more than their padding costs; ONNX Runtime takes each of them alone."""

ROWS_IN_MEMORY_MB = 256.0
"""Vectors up to this size are held in memory. 384 dimensions: 170,000 rows, which a lone prompt is
compared with about as fast as an index answers."""
