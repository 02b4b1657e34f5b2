"""ConfDiff: force-guided SE(3) diffusion for protein conformations (arXiv 2403.14088)."""
