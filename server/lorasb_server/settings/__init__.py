"""What the server is told: `Settings` by its operator, of which `ServerConfig` and `ListenConfig`
are made. The environment is read in `sources` and nowhere else.
"""

from lorasb_server.settings.declared import Settings
from lorasb_server.settings.server_config import ListenConfig, ServerConfig, Tls

__all__ = ["ListenConfig", "ServerConfig", "Settings", "Tls"]
