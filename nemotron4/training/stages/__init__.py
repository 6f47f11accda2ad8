"""What a stage is: which loss it takes from a row's scores, and what it reports."""
