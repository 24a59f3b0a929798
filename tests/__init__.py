"""The environment of the tests, set before torch and transformers read it."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Outputs are compared bit by bit. Without this, MKL's AVX-512 products round by where their arguments lie in memory.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
