"""How a model answers: likelihoods of closed answers in one pass, or generated text."""
