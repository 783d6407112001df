"""The front-end process: it accepts requests, hands them to engines and streams their outputs."""
