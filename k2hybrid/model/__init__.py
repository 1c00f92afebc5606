"""The network: attention over latent pages, router, mixture of experts, and the sampler. Layer 3."""
