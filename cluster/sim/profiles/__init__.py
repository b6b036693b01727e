"""What hardware costs: the seconds of an engine step and the rates of links, measured or computed from data sheets."""
