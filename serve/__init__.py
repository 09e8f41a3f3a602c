"""From a request to tokens: protocol, engines, the HTTP application."""
