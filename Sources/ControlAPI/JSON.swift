// JSON: how the control API's values are written: keys with dashes, as in the configuration file.
//
// Called by: targetd, targetctl. Must not know: the values.

public import Foundation

/// The API's notation.
public enum JSON {
    /// The text for a value, with its keys in order and a line for each.
    public static func encode(_ value: some Encodable) -> Data {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.sortedKeys, .prettyPrinted, .withoutEscapingSlashes]
        // Keys of dictionaries are data, but all of ours are numbers, which stay as they are.
        encoder.keyEncodingStrategy = .custom { Key(dashed($0.last!.stringValue)) }
        do {
            return try encoder.encode(value)
        } catch {
            // Strings, whole numbers, truth values and their lists: nothing that JSON could not say.
            preconditionFailure("\(Swift.type(of: value)) cannot be written: \(error)")
        }
    }

    /// The text for a value, in one line with its end.
    public static func line(_ value: some Encodable) -> Data {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.sortedKeys, .withoutEscapingSlashes]
        encoder.keyEncodingStrategy = .custom { Key(dashed($0.last!.stringValue)) }
        do {
            return try encoder.encode(value) + Data("\n".utf8)
        } catch {
            preconditionFailure("\(Swift.type(of: value)) cannot be written: \(error)")
        }
    }

    /// The value of a text.
    public static func decode<Value: Decodable>(_ type: Value.Type, from data: Data) throws -> Value {
        let decoder = JSONDecoder()
        decoder.keyDecodingStrategy = .custom { Key(joined($0.last!.stringValue)) }
        return try decoder.decode(type, from: data)
    }

    private struct Key: CodingKey {
        var stringValue: String
        var intValue: Int? { nil }

        init(_ text: String) { stringValue = text }
        init?(stringValue: String) { self.stringValue = stringValue }
        init?(intValue: Int) { nil }
    }

    /// `bytesRead` → `bytes-read`
    public static func dashed(_ name: String) -> String {
        var result = ""
        for letter in name {
            if letter.isUppercase { result += "-" }
            result += letter.lowercased()
        }
        return result
    }

    /// `bytes-read` → `bytesRead`
    static func joined(_ name: String) -> String {
        let words = name.split(separator: "-", omittingEmptySubsequences: false)
        return words.dropFirst().reduce(String(words[0])) { $0 + $1.prefix(1).uppercased() + $1.dropFirst() }
    }
}
