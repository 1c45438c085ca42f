"""How many rows the layers of a stage are given: its own, and filler that nobody reads.

oneDNN makes a kernel for each number of rows that a matrix product is asked for, 1.4-2.9 ms each on
a core with AMX (`ONEDNN_VERBOSE=profile_create`), and keeps 1,024 of them. vLLM asks for one number
a step; the stages of a truncated step have several, and hardly ever those of the step before.
"""

STEPS = ((8, 1), (64, 8), (128, 16), (512, 32))
"""Up to so many rows, widths are multiples of this; coarse enough to come again, 12% on average."""
BEYOND = 128


def exact(num_rows: int) -> int:
    """No filler: for products that need no kernel of their own."""
    return num_rows


def recurring(num_rows: int) -> int:
    """The least of 43 widths up to 2,048 that holds `num_rows`; never less for more rows."""
    multiple = next((step for most, step in STEPS if num_rows <= most), BEYOND)
    return -(-num_rows // multiple) * multiple
