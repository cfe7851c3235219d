"""Lower bounds on eps from attacks: canaries in the training itself, and a finished model's losses."""
