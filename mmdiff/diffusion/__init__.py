"""The mathematics of masked diffusion. Functions of tensors and callables; no model class is known here."""
