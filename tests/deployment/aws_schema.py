"""The schema of the AWS provider 6.25.0 for Terraform, read from the published wheel of its CDK bindings.

The bindings are generated from the provider's own schema, and the wheel carries their TypeScript source inside source maps:
it is read as text, nothing of it is run. Not known from it: which values are sensitive (but for KNOWN_SENSITIVE), what is
deprecated, limits of a block other than "at least one" and "at most one", and every check the provider makes in code.
"""

import base64
import json
import re
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROVIDER_ADDRESS = "registry.terraform.io/hashicorp/aws"
PROVIDER_VERSION = "6.25.0"

# Source text by the folder, or by the class or interface, that it is of.
Sources = dict[str, str]
# A part of the schema, as JSON has it.
Json = dict[str, Any]

SOURCE_MAP = b"//# sourceMappingURL=data:application/json;base64,"
SECTION = re.compile(r"^export (?:class|interface) (\w+)", re.MULTILINE)
MAIN_CLASS = re.compile(r"^ extends cdktf\.Terraform(?:Resource|DataSource|Provider) \{")
CONFIGURATION = re.compile(r"public constructor\(scope: Construct, id: string, config: (\w+)")
MEMBER = re.compile(r"^  // (\w+) - computed: (true|false), optional: (true|false), required: (true|false)\n((?:.*\n){3})", re.MULTILINE)
BLOCK = re.compile(r"^  \* (\w+) block$", re.MULTILINE)
ARGUMENT = re.compile(r'^ +(\w+): \{\n +value: .*\n +isBlock: \w+,\n +type: "(\w+)",\n +storageClassType: "(\w+)"', re.MULTILINE)
PROVIDER_ARGUMENT = re.compile(r"#\w+ AwsProvider#(\w+)\}\n  \*/\n  readonly \w+(\??):")
COMPLEX = re.compile(r'new (\w+?)(List|Map|OutputReference)\(this, "\w+"(?:, (true|false))?\)')
SIMPLE_MAP = re.compile(r"new cdktf\.(String|Number|Boolean)Map\(")
GETTER = re.compile(r"this\.(get\w+Attribute)\(")

PRIMITIVES = {"string": "string", "number": "number", "boolean": "bool", "any": "dynamic"}
GETTERS = {
    "getStringAttribute": "string",
    "getNumberAttribute": "number",
    "getBooleanAttribute": "bool",
    "getListAttribute": ["list", "string"],
    "getNumberListAttribute": ["list", "number"],
}
# Values Terraform keeps out of its output and refuses in an ordinary output; the wheel does not say, so only these are marked.
KNOWN_SENSITIVE = {
    "aws_ssm_parameter": {"value"},
    "aws_secretsmanager_secret_version": {"secret_string", "secret_binary"},
    "aws_elasticache_replication_group": {"auth_token"},
    "aws_iam_access_key": {"secret", "ses_smtp_password_v4"},
}


@dataclass(frozen=True)
class Member:
    """One argument, attribute or block, as the generator's comment announces it."""

    name: str
    computed: bool
    optional: bool
    required: bool
    declaration: str


def read_schema(wheel: Path, resource_types: Iterable[str], data_source_types: Iterable[str]) -> Json:
    """The provider's schema in the form of `terraform providers schema -json`, with these resources and data sources only.

    A type that the provider does not have is left out, so that Terraform itself refuses it. "optional" and "computed" are the
    provider's own, so a mock provider fills exactly what AWS would.
    """
    resources = {folder_of(name): name for name in resource_types}
    data_sources = {f"data-aws-{folder_of(name)}": name for name in data_source_types}
    sources = read_sources(wheel, {"provider", *resources, *data_sources})
    return {
        "format_version": "1.0",
        "provider_schemas": {
            PROVIDER_ADDRESS: {
                "provider": {"version": 0, "block": provider_block(sources["provider"])},
                "resource_schemas": schemas(sources, resources),
                "data_source_schemas": schemas(sources, data_sources),
            }
        },
    }


def folder_of(type_name: str) -> str:
    return type_name.removeprefix("aws_").replace("_", "-")


def read_sources(wheel: Path, folders: set[str]) -> Sources:
    """The TypeScript text of each of these folders that the wheel has."""
    sources: Sources = {}
    with zipfile.ZipFile(wheel) as archive:
        package = next(name for name in archive.namelist() if name.endswith(".jsii.tgz"))
        with archive.open(package) as file, tarfile.open(fileobj=file, mode="r|gz") as members:
            for member in members:
                # A few resources are so large that they are spread over several files of their folder.
                parts = member.name.split("/")
                if parts[:2] != ["package", "lib"] or parts[2] not in folders or not member.name.endswith(".js"):
                    continue
                content = members.extractfile(member)
                if content is not None:
                    sources[parts[2]] = sources.get(parts[2], "") + original_source(content.read())
    return sources


def original_source(javascript: bytes) -> str:
    encoded = javascript.rpartition(SOURCE_MAP)[2]
    return "".join(json.loads(base64.b64decode(encoded))["sourcesContent"])


def schemas(sources: Sources, folders: dict[str, str]) -> Json:
    return {name: {"version": 0, "block": main_block(sources[folder], name)} for folder, name in folders.items() if folder in sources}


def main_block(source: str, type_name: str) -> Json:
    sections = split_sections(source)
    name = next(name for name, text in sections.items() if MAIN_CLASS.match(text))
    block = class_block(sections, name)
    for attribute in KNOWN_SENSITIVE.get(type_name, set()) & block["attributes"].keys():
        block["attributes"][attribute]["sensitive"] = True
    return block


def split_sections(source: str) -> Sources:
    """The text of each class and interface; the functions that follow an interface are part of its section."""
    _, *pieces = SECTION.split(source)
    return dict(zip(pieces[::2], pieces[1::2], strict=True))


def class_block(sections: Sources, name: str) -> Json:
    """The block that a class describes: a main class, or the "OutputReference" of a nested block."""
    configuration = CONFIGURATION.search(sections[name])
    described = sections[configuration[1]] if configuration else sections[name.removesuffix("OutputReference")]
    blocks = set(BLOCK.findall(described))
    # The arguments' types are in the main class itself, or beside the interface of a nested block.
    arguments = argument_types(sections[name] if configuration else described)
    attributes: Json = {}
    block_types: Json = {}
    for member in class_members(sections[name]):
        if member.name in blocks:
            block_types[member.name] = nested_block(sections, member, arguments[member.name][0])
        else:
            attributes[member.name] = attribute(member, member_type(sections, member, arguments.get(member.name)))
    return {"attributes": attributes, "block_types": block_types}


def class_members(text: str) -> Iterator[Member]:
    for name, computed, optional, required, declaration in MEMBER.findall(text):
        yield Member(name, computed == "true", optional == "true", required == "true", declaration)


def argument_types(text: str) -> dict[str, tuple[str, str]]:
    """For each argument its kind ("simple", "list", "set", "map", "struct") and the generator's word for its type."""
    return {name: (kind, storage) for name, kind, storage in ARGUMENT.findall(text)}


def attribute(member: Member, type_: object) -> Json:
    flags = {
        "required": member.required,
        "optional": member.optional,
        "computed": member.computed,
        # The provider's name for an argument that is never stored; has_..._wo is an ordinary value.
        "write_only": member.name.endswith("_wo") and not member.computed,
    }
    return {"type": type_, **{flag: True for flag, is_set in flags.items() if is_set}}


def member_type(sections: Sources, member: Member, argument: tuple[str, str] | None) -> object:
    complex_ = COMPLEX.search(member.declaration)
    if complex_:
        class_name, form, wraps_set = complex_.groups()
        fields = object_type(sections, f"{class_name}OutputReference")
        if form == "OutputReference":
            return fields
        return [{"Map": "map", "List": "set" if wraps_set == "true" else "list"}[form], fields]
    simple_map = SIMPLE_MAP.search(member.declaration)
    if simple_map:
        return ["map", PRIMITIVES[simple_map[1].lower()]]
    if argument:
        return argument_type(*argument)
    if "interpolationForAttribute" in member.declaration:
        return "dynamic"
    getter = GETTER.search(member.declaration)
    if not getter:
        raise ValueError(f"cannot tell the type of {member.name}: {member.declaration}")
    found = GETTERS[getter[1]]
    return ["set", found[1]] if "Fn.tolist" in member.declaration else found


def object_type(sections: Sources, name: str) -> list[object]:
    arguments = argument_types(sections[name.removesuffix("OutputReference")])
    members = class_members(sections[name])
    return ["object", {member.name: member_type(sections, member, arguments.get(member.name)) for member in members}]


def argument_type(kind: str, storage: str) -> object:
    """For example "set" and "stringList" is a set of strings, "list" and "stringMapList" a list of maps of strings."""
    primitive, *containers = re.findall(r"[A-Z]?[a-z]+", storage)
    found: object = PRIMITIVES[primitive]
    for container in containers:
        found = [container.lower(), found]
    return [kind, found[1]] if isinstance(found, list) else found


def nested_block(sections: Sources, member: Member, kind: str) -> Json:
    complex_ = COMPLEX.search(member.declaration)
    if not complex_:
        # The generator gave up on these few (the statement of a firewall rule holds statements, without end).
        raise ValueError(f"the wheel does not describe the block {member.name}")
    class_name, form, _ = complex_.groups()
    block = class_block(sections, f"{class_name}OutputReference")
    return limited_block(block, kind, required=member.required, single=form == "OutputReference")


def limited_block(block: Json, kind: str, *, required: bool, single: bool) -> Json:
    if kind == "struct":  # only ever "timeouts", which is never required
        return {"nesting_mode": "single", "block": block}
    limits = {"min_items": required, "max_items": single}
    return {"nesting_mode": kind, "block": block, **{limit: 1 for limit, is_set in limits.items() if is_set}}


def provider_block(source: str) -> Json:
    """The provider's own configuration; its nested blocks have an interface only, and no "at most one"."""
    sections = split_sections(source)
    return interface_block(sections, sections["AwsProviderConfig"], argument_types(sections["AwsProvider"]))


def interface_block(sections: Sources, text: str, arguments: dict[str, tuple[str, str]]) -> Json:
    blocks = set(BLOCK.findall(text))
    required = {name: optional == "" for name, optional in PROVIDER_ARGUMENT.findall(text)}
    attributes: Json = {}
    block_types: Json = {}
    for name, (kind, storage) in arguments.items():
        if name in blocks:
            inner = sections[storage.removesuffix("List")]
            block = interface_block(sections, inner, argument_types(inner))
            block_types[name] = limited_block(block, kind, required=required[name], single=False)
        elif name != "alias":  # Terraform's own argument, which no provider's schema has
            attributes[name] = {"type": argument_type(kind, storage), "required" if required[name] else "optional": True}
    return {"attributes": attributes, "block_types": block_types}
