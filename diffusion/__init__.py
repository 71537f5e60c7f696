"""The mathematics of diffusion: processes, guidance and solvers. It knows no network and no config."""
