"""Ways to damage bytes and lines of text, chosen at random."""

import numpy as np

# What has been taken for another number, for a name, or for a command, somewhere.
FIELDS = (
    *(b"", b"0", b"-1", b"007", b"+3", b"3.0", b"3.5", b"1e0", b"1e30", b"nan", b"inf", b"NA", b"null", b"0x1", b"1_0"),
    *(b" 1", b"1 ", b"\t1", b'"1"', b"'1'", b"1\r", b"1,2", b"\xc3\xa9", b"\xff\xfe", b"\0", b"\x1b]0;x\x07"),
    *(b"2147483647", b"2147483648", b"4294967296", b"1099511627776", b"9223372036854775807", b"9223372036854775808"),
    *(b"978342450", b"978342450000", b"978342450000000", b"978342450000000000", b"-978342450", b"9" * 40, b"9" * 5000),
)


def damaged(random: np.random.Generator, content: bytes) -> tuple[bytes, str]:
    """One to three faults of bytes, as disks, transfers and editors make them; and what they are."""
    done = []
    for _ in range(int(random.choice([1, 1, 1, 2, 3]))):
        place = int(random.integers(max(len(content), 1)))
        size = int(random.choice([1, 4, 64, 512]))
        piece = content[place : place + size]
        match int(random.integers(7)):
            case 0 | 1 if content:
                bit = int(random.integers(8))
                content, name = (
                    content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :],
                    f"bit {bit}",
                )
            case 2:
                content, name = content[:place], "cut off"
            case 3:
                content, name = content[:place] + bytes(len(piece)) + content[place + size :], f"{size} bytes zeroed"
            case 4:
                content, name = content[:place] + piece + content[place:], f"{size} bytes twice"
            case 5:
                content, name = content[:place] + content[place + size :], f"{size} bytes gone"
            case _:
                content, name = content[:place] + random.bytes(size) + content[place:], f"{size} random bytes in"
        done.append(f"{name} at {place}")
    return content, ", ".join(done)


def edited(random: np.random.Generator, text: bytes, separator: bytes) -> tuple[bytes, str]:
    """One to three faults of lines or of fields between separators; and what they are."""
    done = []
    for _ in range(int(random.choice([1, 1, 1, 2, 3]))):
        lines = text.split(b"\n")
        number = int(random.integers(len(lines)))
        fields = lines[number].split(separator)
        column = int(random.integers(len(fields)))
        match int(random.integers(12)):
            case 0 | 1 | 2 | 3 | 4:
                fields[column] = FIELDS[int(random.integers(len(FIELDS)))]
                lines[number], name = separator.join(fields), f"field {column} is {fields[column][:30]!r}"
            case 5:
                lines[number], name = separator.join(fields[:column] + fields[column + 1 :]), f"field {column} gone"
            case 6:
                other = (b",", b"\t", b" ", b";", b"\x01")[int(random.integers(5))]
                lines[number], name = lines[number].replace(separator, other), f"separated by {other!r}"
            case 7:
                lines.insert(number, lines[number])
                name = "line twice"
            case 8:
                lines[number : number + 1] = []
                name = "line gone"
            case 9:
                lines.insert(number, (b"", b"\r", b" ", b"#")[int(random.integers(4))])
                name = "line without fields"
            case 10:
                lines = [line + b"\r" for line in lines[:-1]] + lines[-1:]
                name = "CR LF"
            case _:
                lines[0], name = b"\xef\xbb\xbf" + lines[0], "byte order mark"
        text = b"\n".join(lines)
        done.append(f"line {number + 1}: {name}")
    return text, ", ".join(done)


def changed(random: np.random.Generator, text: bytes, separator: bytes) -> tuple[bytes, str]:
    """Text with faults of bytes or of fields."""
    return damaged(random, text) if random.random() < 0.3 else edited(random, text, separator)
