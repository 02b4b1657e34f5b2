"""Image and discrete diffusion (SPIN-Diffusion, DNDM)."""
