"""Classification kernels: one file a family, each with a plain reference and its compiled forms side by side."""
