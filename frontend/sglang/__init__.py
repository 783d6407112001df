"""SGLang's words for requests, results and aborts, as its `Engine` and its HTTP server use them."""
