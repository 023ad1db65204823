"""The simulated network and its relay. Never imports `event` or `table`: a shared bug could hide."""
