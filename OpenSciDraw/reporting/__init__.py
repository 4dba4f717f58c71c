"""The parts of `scienceflow report`: what a run holds, its charts, and the page."""
