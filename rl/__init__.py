"""Policy gradients with recursive variance reduction (STORM-PG and relatives)."""
