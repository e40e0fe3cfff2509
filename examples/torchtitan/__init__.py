"""Pre-training of a small MoE by torchtitan's own trainer, with the experts of this library."""
