// PageMap: which pages of a RAM disk hold data, a bit each.
//
// Owns: the bits. Called by: RAMBackstore, on its reactor's thread. Must not know: requests.

import Glibc

/// The pages that have been written since they were last cleared. The bits lie in memory that the kernel provides when
/// it is touched, so that a large empty disk costs nothing here either.
@safe
struct PageMap {
    private let words: UnsafeMutablePointer<UInt64>
    /// The word behind those: how many bits are set.
    private let countWord: UnsafeMutablePointer<UInt64>
    private let bytes: Int
    private let pages: UInt64

    init(pages: UInt64) throws(BackstoreError) {
        self.pages = pages
        bytes = (Int((pages + 63) / 64) + 1) * 8
        let mapping = unsafe mmap(
            nil, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        guard let memory = unsafe mapping, unsafe memory != MAP_FAILED else {
            throw BackstoreError("RAM disk", .systemCall("mmap of \(bytes) bytes", errno: errno))
        }
        unsafe words = memory.assumingMemoryBound(to: UInt64.self)
        unsafe countWord = words + (bytes / 8 - 1)
    }

    /// How many pages hold data.
    var count: UInt64 { unsafe countWord.pointee }

    func destroy() { unsafe munmap(words, bytes) }

    /// Marks pages as holding data.
    @inline(__always)
    func set(_ range: Range<UInt64>) {
        for page in range {
            let word = unsafe words + Int(page / 64)
            let bit: UInt64 = 1 << (page % 64)
            if unsafe word.pointee & bit != 0 { continue }
            unsafe word.pointee |= bit
            unsafe countWord.pointee += 1
        }
    }

    /// Marks pages as empty.
    func clear(_ range: Range<UInt64>) {
        var page = range.lowerBound
        while page < range.upperBound {
            let count = min(64 - page % 64, range.upperBound - page)
            let mask = (count == 64 ? UInt64.max : 1 << count - 1) << (page % 64)
            // Not written where nothing is to be cleared: that would make memory of the bits of an empty disk.
            let set = unsafe words[Int(page / 64)] & mask
            if set != 0 {
                unsafe words[Int(page / 64)] &= ~mask
                unsafe countWord.pointee -= UInt64(set.nonzeroBitCount)
            }
            page += count
        }
    }

    /// The run of pages in one state that begins at `page`.
    ///
    /// - Parameter limit: How many words of bits are looked at; the run may end there because of that.
    func run(from page: UInt64, limit: Int) -> (isMapped: Bool, end: UInt64) {
        let isMapped = unsafe words[Int(page / 64)] >> (page % 64) & 1 == 1
        let flip: UInt64 = isMapped ? .max : 0
        var index = Int(page / 64)
        var word = unsafe (words[index] ^ flip) & UInt64.max << (page % 64)
        let lastIndex = min(index + limit, Int((pages - 1) / 64))
        while word == 0, index < lastIndex {
            index += 1
            word = unsafe words[index] ^ flip
        }
        let end = UInt64(index) * 64 + UInt64(word == 0 ? 64 : word.trailingZeroBitCount)
        return (isMapped: isMapped, end: min(end, pages))
    }
}
