"""What is computed: plain PyTorch modules for one device, the reference every layout is compared with.

Nothing here knows of ranks. Each module exposes its stages under the names that the operator lists in
`megascale_moe.strategies` use, and parameters carry the same names in both worlds.
"""
