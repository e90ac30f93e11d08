"""DOLLAR in JAX: distils a text-to-video diffusion teacher into a student of one to four steps. Variational score
distillation, consistency distillation and latent reward fine-tuning in one jitted, mesh-sharded train step (arXiv
2412.15689, Algorithm 29; see `dollar_jax.step`). The command line is `dollar`, or `python -m dollar_jax`."""

__version__ = "0.2.0"
