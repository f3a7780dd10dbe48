"""How runs start: on this machine or over a hostfile, and what every start needs: device, operators, plan."""
