"""Use a trained reward model: score texts by the contract saved beside the weights."""
