"""What a synthetic data set is worth: utility and fidelity, each marked private or not."""
