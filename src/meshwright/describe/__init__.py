"""What is trained, on what: models, clusters and jobs, before anything is split."""
