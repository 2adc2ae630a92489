"""A site's half of a run, in the pieces that :class:`fedsecure.client.Client` puts together."""
