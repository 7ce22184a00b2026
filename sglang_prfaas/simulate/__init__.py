"""A discrete-event simulator on a virtual clock that runs the production decision function."""
