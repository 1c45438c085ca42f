"""How many rows the layers of a stage are given: its own, and filler that nobody reads.

oneDNN makes a kernel for each number of rows that a matrix product is asked for, 1.4-2.9 ms each on
a core with AMX (`ONEDNN_VERBOSE=profile_create`), 1 ms with AVX2, and keeps 1,024 of them; vLLM has
each layer remember 32. vLLM asks for one number a step; the stages of a truncated step have
several. When requests decode these are small and come again by themselves; in a step with prompts
they hardly ever are those of the step before.
"""

STEPS = ((32, 1), (64, 2), (128, 8), (512, 32))
"""Up to so many rows, widths are multiples of this. Filler costs what rows cost, with AVX2 from one
row on: up to 64 rows, as decoding has them, it is less than 1% on average."""
BEYOND = 128


def exact(num_rows: int) -> int:
    """No filler: for products that need no kernel of their own."""
    return num_rows


def recurring(num_rows: int) -> int:
    """The least of 80 widths up to 2,048 that holds `num_rows`; never less for more rows."""
    multiple = next((step for most, step in STEPS if num_rows <= most), BEYOND)
    return -(-num_rows // multiple) * multiple
