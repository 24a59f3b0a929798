"""What the benchmarks share: result files, tables and numbers as text, the record of the machine, colors."""
