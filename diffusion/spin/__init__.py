"""SPIN-Diffusion (arXiv 2402.10210): a text-to-image model plays against its own earlier images."""
