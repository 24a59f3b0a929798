"""PEFT's own tests, with `HiFICLConfig` in the place of PEFT's methods: `python -m tests.peer_suite`.

They come from the source archive of the installed PEFT, and run offline on tiny random models (`models`) in the
folders that the tests name. What is left out or expected to be refused, and why, is in `plugin` and
docs/peer-suite.md.
"""
