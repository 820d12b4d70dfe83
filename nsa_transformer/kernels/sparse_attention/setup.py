"""`python setup.py build_ext --inplace` will build the CUDA C++ extension here. There is none yet, and this says so."""

import sys

print("error: the CUDA extension is not there yet; nsa_attention runs on its reference backend (nsa doctor lists what works)", file=sys.stderr)
sys.exit(2)
