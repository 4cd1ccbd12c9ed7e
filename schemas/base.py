"""Base of every config model."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Base of every config: frozen, and a key that is not known is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
