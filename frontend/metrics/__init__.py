"""What the front end counts, and the page that Prometheus scrapes."""

from frontend.metrics.recorder import Metrics as Metrics
