"""A stand-in for the AWS provider: `python aws_provider.py SCHEMA.json` serves that schema to Terraform, and nothing else.

It is a Terraform plugin (protocol 5, gRPC). Of the real provider's own checks it makes one: that nobody sets a read-only
attribute. It knows no AWS, and has no plan, apply or read, so only `validate` and tests with a mock provider work with it.
"""

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import msgspec
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

# Terraform sets this variable for plugins, so that a plugin started by hand can print an explanation.
COOKIE_NAME = "TF_PLUGIN_MAGIC_COOKIE"
COOKIE = "d602bf8f470bc67ca7faa0386276bbdd4330efaf76d1a219cb4d6991ca9872b2"

# The messages and fields that are needed: each field's number and type, "*" for a list, a capital for another message.
# An enumeration is an int32 on the wire, and a map a list of entries.
MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "Attribute": {
        "name": (1, "string"),
        "type": (2, "bytes"),
        "required": (4, "bool"),
        "optional": (5, "bool"),
        "computed": (6, "bool"),
        "sensitive": (7, "bool"),
        "write_only": (10, "bool"),
    },
    "NestedBlock": {
        "type_name": (1, "string"),
        "block": (2, "Block"),
        "nesting": (3, "int32"),
        "min_items": (4, "int64"),
        "max_items": (5, "int64"),
    },
    "Block": {"attributes": (2, "*Attribute"), "block_types": (3, "*NestedBlock")},
    "Schema": {"version": (1, "int64"), "block": (2, "Block")},
    "SchemaEntry": {"key": (1, "string"), "value": (2, "Schema")},
    "GetProviderSchemaResponse": {
        "provider": (1, "Schema"),
        "resource_schemas": (2, "*SchemaEntry"),
        "data_source_schemas": (3, "*SchemaEntry"),
    },
    "DynamicValue": {"msgpack": (1, "bytes")},
    "Diagnostic": {"severity": (1, "int32"), "summary": (2, "string"), "detail": (3, "string")},
    "ValidateRequest": {"type_name": (1, "string"), "config": (2, "DynamicValue")},
    "ValidateResponse": {"diagnostics": (1, "*Diagnostic")},
}
NESTING = {"single": 1, "list": 2, "set": 3}
ERROR = 1

# A function from the bytes of a request to the bytes of its response.
Answer = Callable[[bytes], bytes]
NOTHING = b""


def message_classes() -> Mapping[str, Any]:
    """A protobuf class for each of MESSAGES."""
    package = "stand_in"
    file = descriptor_pb2.FileDescriptorProto(name="stand_in.proto", package=package, syntax="proto3")
    for message_name, fields in MESSAGES.items():
        message = file.message_type.add(name=message_name)
        for field_name, (number, type_name) in fields.items():
            field = message.field.add(name=field_name, number=number)
            field.label = field.LABEL_REPEATED if type_name.startswith("*") else field.LABEL_OPTIONAL
            type_name = type_name.removeprefix("*")
            if type_name in MESSAGES:
                field.type = field.TYPE_MESSAGE
                field.type_name = f".{package}.{type_name}"
            else:
                field.type = field.Type.Value(f"TYPE_{type_name.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}")) for name in MESSAGES}


def encode_schema(classes: Mapping[str, Any], provider: dict[str, Any]) -> bytes:
    """The response to GetSchema for a provider in the form of `terraform providers schema -json`."""

    def block(source: dict[str, Any]) -> Any:
        attributes = [
            classes["Attribute"](name=name, **{**fields, "type": json.dumps(fields["type"]).encode()})
            for name, fields in source["attributes"].items()
        ]
        return classes["Block"](attributes=attributes, block_types=[nested(name, inner) for name, inner in source["block_types"].items()])

    def nested(name: str, source: dict[str, Any]) -> Any:
        limits = {limit: source[limit] for limit in ("min_items", "max_items") if limit in source}
        return classes["NestedBlock"](type_name=name, block=block(source["block"]), nesting=NESTING[source["nesting_mode"]], **limits)

    def schema(source: dict[str, Any]) -> Any:
        return classes["Schema"](version=source["version"], block=block(source["block"]))

    def entries(sources: dict[str, Any]) -> list[Any]:
        return [classes["SchemaEntry"](key=name, value=schema(source)) for name, source in sources.items()]

    response = classes["GetProviderSchemaResponse"](
        provider=schema(provider["provider"]),
        resource_schemas=entries(provider["resource_schemas"]),
        data_source_schemas=entries(provider["data_source_schemas"]),
    )
    encoded: bytes = response.SerializeToString()
    return encoded


def read_only_values(block: dict[str, Any], values: dict[str, Any]) -> Iterator[str]:
    """The names of the read-only attributes that have a value, in a block and the blocks in it."""
    for name, attribute in block["attributes"].items():
        if not attribute.get("required") and not attribute.get("optional") and values[name] is not None:
            yield name
    for name, nested in block["block_types"].items():
        inner = values[name]
        # Neither a list nor an object: there is no block, or a `dynamic` block makes it from unknown values.
        for item in inner if isinstance(inner, list) else [inner] if isinstance(inner, dict) else []:
            if isinstance(item, dict):
                yield from (f"{name}.{found}" for found in read_only_values(nested["block"], item))


def validator(classes: Mapping[str, Any], schemas: dict[str, Any]) -> Answer:
    def validate(request: bytes) -> bytes:
        message = classes["ValidateRequest"].FromString(request)
        values = msgspec.msgpack.decode(message.config.msgpack)
        diagnostics = [
            classes["Diagnostic"](severity=ERROR, summary="Read-only attribute", detail=f'The value of "{name}" is AWS\'s to decide.')
            for name in read_only_values(schemas[message.type_name]["block"], values)
        ]
        response: bytes = classes["ValidateResponse"](diagnostics=diagnostics).SerializeToString()
        return response

    return validate


def services(provider: dict[str, Any], stopped: threading.Event) -> dict[str, dict[str, Answer]]:
    """The implemented calls by service and method: all that Terraform 1.11 makes. Other calls are UNIMPLEMENTED."""
    classes = message_classes()
    schema = encode_schema(classes, provider)

    def shut_down(request: bytes) -> bytes:
        stopped.set()
        return NOTHING

    return {
        "tfplugin5.Provider": {
            "GetSchema": lambda request: schema,
            # The request's only field is the configuration; the response's field of the same number is the configuration to use.
            "PrepareProviderConfig": lambda request: request,
            "ValidateResourceTypeConfig": validator(classes, provider["resource_schemas"]),
            "ValidateDataSourceConfig": validator(classes, provider["data_source_schemas"]),
            "Configure": lambda request: NOTHING,
        },
        "plugin.GRPCController": {"Shutdown": shut_down},
    }


def method_handler(answer: Answer) -> "grpc.RpcMethodHandler[bytes, bytes]":
    return grpc.unary_unary_rpc_method_handler(lambda request, context: answer(request))


def serve(provider: dict[str, Any]) -> None:
    stopped = threading.Event()
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    for service, answers in services(provider, stopped).items():
        handlers = {method: method_handler(answer) for method, answer in answers.items()}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"1|5|tcp|127.0.0.1:{port}|grpc", flush=True)
    # A killed Terraform sends no signal, but the parent process changes.
    parent = os.getppid()
    while not stopped.wait(timeout=1) and os.getppid() == parent:
        pass
    server.stop(grace=1).wait()


def main() -> None:
    if os.environ.get(COOKIE_NAME) != COOKIE:
        sys.exit("This is a plugin that Terraform starts; it does nothing on its own.")
    (provider,) = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["provider_schemas"].values()
    serve(provider)


if __name__ == "__main__":
    main()
