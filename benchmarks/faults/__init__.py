"""Parts of benchmarks/fault_injection.py."""
