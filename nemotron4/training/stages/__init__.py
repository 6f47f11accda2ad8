"""The stages of training, one to a file: what ``nemotron4.training.stage`` finds here is a stage."""
