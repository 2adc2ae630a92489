"""Learning at a site: adapters over frozen features, per-unit clipped sums, training, evaluation, artefacts."""
