"""One MLP's place, timed: the dense MLP against the chain and its fast forms, on any device."""
