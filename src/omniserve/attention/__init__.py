"""Device attention back ends: KV memory of the device, decode and prefill attention over pages.

cpu.py   CPU threads as the device: our native kernels over its own paged KV
"""
